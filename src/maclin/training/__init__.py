"""What every training stands on, in the arena and in healing: checkpoints, schedules, signals, the machine."""
