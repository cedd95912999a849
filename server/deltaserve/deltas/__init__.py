"""The life of an artifact: made from checkpoints, written, read, checked, stored, brought to the device."""
