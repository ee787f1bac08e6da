"""The configuration: every knob, typed and documented (`schema`), and strict loading from YAML (`load`)."""
