"""The two stages chained; imported by the entry scripts only."""
