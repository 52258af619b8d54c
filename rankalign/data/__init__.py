"""The record, and all that becomes one or is made of one."""
