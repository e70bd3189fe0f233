"""Tables that a test run prints at its end, made of what its tests reported, in however many processes they ran."""
