#define AFA_ISA neon
#define AFA_NEON_LEVEL 1
#include "cpu/isa/table.h"
