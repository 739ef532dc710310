"""cfg -> parts -> stack: what a cfg describes, built, checked and put together."""
