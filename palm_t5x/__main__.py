"""`python -m palm_t5x MODE ...` is `t5x MODE ...`."""

from palm_t5x import main

if __name__ == '__main__':
  main.run()
