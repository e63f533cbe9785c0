"""What an unmerged LoRA costs: forward latency, merged against unmerged, with the physical floor beside it."""
