assign q = 1;
initial forever begin #1_$deposit (a, 4'd0); end
endmodule
