// How fast this processor multiplies and adds, as the bound that products are measured against.

#pragma once

namespace vitslim {

// Returns the float32 multiply-adds a second that one thread reaches on registers alone, with the
// instruction set in use, measured for about `seconds`.
double multiply_add_rate(double seconds);

}  // namespace vitslim
