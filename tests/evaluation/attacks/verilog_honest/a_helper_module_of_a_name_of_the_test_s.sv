reference_module r(.a(a), .q(q));
endmodule
module reference_module(input [3:0] a, output [3:0] q);
assign q = a + 4'd1;
endmodule
