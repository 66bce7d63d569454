assign q = 1;
reg r = 'b1;
initial if (1 == 1'b1) begin #1s; end
initial begin r = 1'b1;#1e0force a = 0; end
endmodule
