"""PaLM in Flax and JAX, configured, trained and evaluated the way T5X users work.

`t5x --help` lists what can be done; `palm_t5x.main` is that command. Importing the
package imports nothing else.
"""

import os as _os

# In a checkout tasks/, mixtures/ and gin/ lie beside this folder; a wheel holds them in
# it. Looking in both makes `palm_t5x.tasks` one name for either.
if _os.path.exists(_os.path.join(_os.path.dirname(__path__[0]), 'setup.cfg')):
  __path__.append(_os.path.dirname(__path__[0]))
