assign (supply1, supply0) a = 4'd0;
assign q = 1;
endmodule
