"""Words that name people by what they are, by category, for counting in a corpus.

What is counted is how often and in how many documents a word occurs, nothing about who
wrote it or what it says of them; many words have other meanings ('black', 'straight').
The paper's own list for its Appendix C is not published. Sources: [paper] the terms of
its co-occurrence prompts (section 10.1.2, Table 34); [common] plain words of everyday
and census English, chosen by this project; slurs are left out.
"""

PRONOUNS = {
  'they/them': 'they them their theirs themselves themself',
  'he/him': 'he him his himself',
  'she/her': 'she her hers herself',
}
# Category -> (source, words separated by spaces, or by _ inside a term of two words).
TERMS = {
  'gender': (
    'common',
    'man men woman women boy boys girl girls male males female females transgender '
    'nonbinary non_binary cisgender genderqueer intersex',
  ),
  'religion': (
    'paper; common',
    'atheism buddhism christianity hinduism islam judaism atheist atheists buddhist '
    'buddhists christian christians hindu hindus muslim muslims jew jews jewish sikh '
    'sikhs catholic catholics protestant protestants',
  ),
  'race and ethnicity': (
    'paper; common',
    'asian asians black white latinx latino latina hispanic hispanics indian indians '
    'middle_eastern african_american african_americans native_american '
    'native_americans '
    'indigenous caucasian arab arabs roma',
  ),
  'nationality': (
    'common',
    'american americans british chinese german germans french japanese korean koreans '
    'mexican mexicans russian russians nigerian nigerians brazilian brazilians '
    'pakistani '
    'turkish italian italians spanish polish vietnamese',
  ),
  'sexuality': (
    'common',
    'gay lesbian lesbians bisexual homosexual heterosexual straight queer asexual lgbt '
    'lgbtq',
  ),
  'age': (
    'common',
    'young old elderly teenager teenagers child children adult adults senior seniors '
    'middle_aged',
  ),
  'disability': (
    'common',
    'disabled disability disabilities deaf blind autistic autism wheelchair paralyzed '
    'dyslexic able_bodied',
  ),
}
