"""What the facts mean for training: functions of facts, which return findings and read nothing."""
