"""``python -m distckpt.cli``."""

from distckpt.cli.app import main

main(prog_name="distckpt")
