"""Behind :mod:`kasmina_ext.fold`: what takes a and b, who makes an output, what is planned, and how it is undone."""
