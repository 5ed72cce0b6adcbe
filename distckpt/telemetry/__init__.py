"""What managers tell systems that watch jobs: Prometheus and OpenTelemetry, where environment variables ask for it."""
