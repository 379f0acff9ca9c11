"""Speed and quality: benchmarks beside the roofline, perplexity, lm-evaluation-harness."""
