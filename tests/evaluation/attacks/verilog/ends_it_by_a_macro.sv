`define F(x) $``x
assign q = 0;
initial `F(finish);
endmodule
