"""What other programs call the files of weights that they save."""

from __future__ import annotations

from distckpt.format import names

FSDP = "pytorch_model_fsdp"
"""What Accelerate calls a model that FSDP has sharded: a file, or a folder of that name and a number that DCP has written."""

WEIGHTS = (names.WEIGHTS, "diffusion_pytorch_model.safetensors", "adapter_model.safetensors")
TORCH_WEIGHTS = ("pytorch_model.bin", "diffusion_pytorch_model.bin", "adapter_model.bin", f"{FSDP}.bin")
"""Those of Transformers, Diffusers and PEFT, and of Accelerate with FSDP. The index of several files has the same name and
``.index.json``."""
