// The tables that cpp/tools/unicode_tables.py writes. Numbers are in base 32, with the digits 0-9 and a-v.
#pragma once

namespace megalodon::impl {

// Runs of characters, without surrogates, of one category and one set of flags: the category's letter, a letter for the
// flags, and the number of characters unless it is 1.
extern const char* const kClassRuns;

// Changes of characters: the difference to the character before, then the replacement, e.g. "21,10;". The replacement's
// characters are differences to the replaced one: 0, 1, 2, 3, 4 stand for 0, -1, 1, -2, 2.
extern const char* const kLowercase;
extern const char* const kCanonical;     // full canonical decompositions, without Hangul
extern const char* const kCompatible;    // full compatibility decompositions that differ from the canonical ones
extern const char* const kCompositions;  // the pairs that compose to a character

// The difference to the character before and the canonical combining class, e.g. "o0,76;".
extern const char* const kCombiningClasses;

}  // namespace megalodon::impl
