"""Transfer of one small vision transformer to several tasks, with the methods of the Res-Tuning paper's table."""
