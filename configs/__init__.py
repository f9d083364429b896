"""One file a method, named presets inside: `--config=configs/<method>.py:<preset>`."""
