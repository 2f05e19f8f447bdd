"""The report's figures: each function turns numbers into one matplotlib figure."""
