"""Weight changes of other programs as low-rank layers: LoHa, LoKr, full differences, DoRA; rank reduction."""
