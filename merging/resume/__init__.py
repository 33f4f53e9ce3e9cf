"""What lets an interrupted merge go on: journals of finished files, their keys, the folder they wait in, its lock."""
