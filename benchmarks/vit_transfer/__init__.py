"""Transfer of one small vision transformer to several tasks, by the methods of the Res-Tuning paper's table."""
