"""What a choice is defended with: calibration, thresholds, intervals, comparisons; from logits and labels alone."""
