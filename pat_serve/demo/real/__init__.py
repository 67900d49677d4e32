"""The demo that prunes a real pretrained chat model."""
