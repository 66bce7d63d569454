integer i;
initial if ($value$plusargs("x=%d", i)) ;
assign q = 0;
endmodule
