"""What a model is for: one task a module, all filling core.task.Task."""
