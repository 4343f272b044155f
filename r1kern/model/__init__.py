"""DeepSeek-V3 as a Megatron-core model with our layers, and its Hugging Face weights."""
