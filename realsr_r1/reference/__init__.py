"""The paper's scale: Chameleon-class policies, LlamaGen's tokenizer, pretrained language models."""
