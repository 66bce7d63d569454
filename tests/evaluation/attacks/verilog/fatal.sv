assign q = 0;
initial $fatal(0);
endmodule
