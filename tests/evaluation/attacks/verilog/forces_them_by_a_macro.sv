`define F for``ce
assign q = 1;
initial `F a = 0;
endmodule
