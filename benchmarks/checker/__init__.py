"""How fast a merge is judged, by lora_check and by what people use; `python -m benchmarks.checker` measures it."""
