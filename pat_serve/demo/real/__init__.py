"""The demo on a real pretrained chat model."""
