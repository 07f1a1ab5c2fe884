"""What the experiments are made of: tasks and their data, methods, resumable trainings, statistics, tables."""
