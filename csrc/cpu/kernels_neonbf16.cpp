#define AFA_ISA neonbf16
#define AFA_NEON_LEVEL 2
#include "cpu/isa/table.h"
