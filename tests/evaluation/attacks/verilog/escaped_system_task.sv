assign q = 1;
initial forever begin #1 \$deposit (a, 4'd0); end
endmodule
