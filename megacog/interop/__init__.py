"""Files of the original CogView2 and CogVideo programs: weights, tokenizers. The only reader of foreign pickles."""
