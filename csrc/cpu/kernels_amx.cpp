#define AFA_ISA amx
#define AFA_ISA_LEVEL 4
#include "cpu/isa/table.h"
