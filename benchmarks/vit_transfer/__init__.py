"""Transfer of one small vision transformer to several tasks: the order of methods that the Res-Tuning paper reports."""
