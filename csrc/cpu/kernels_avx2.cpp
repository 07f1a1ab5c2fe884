#define AFA_ISA avx2
#define AFA_ISA_LEVEL 1
#include "cpu/isa/table.h"
