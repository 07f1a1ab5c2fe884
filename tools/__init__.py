"""For those who change the kernels: reports on machine code, checks on a GPU, the picture of the schedules."""
