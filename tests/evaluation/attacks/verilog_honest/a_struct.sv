typedef struct packed { logic [3:0] v; } s; s x; assign x.v = a + 1; assign q = x.v;
endmodule
