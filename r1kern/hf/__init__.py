"""Model folders in Hugging Face format: configuration, tensor names, files; free of Megatron."""
