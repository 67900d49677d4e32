"""vLLM, and the code that knows it. This folder alone imports or patches vLLM, and it knows no HTTP."""
