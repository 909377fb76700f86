"""When it goes wrong: notice it, say why, leave what explains it, stop or start again."""
