assign q = 0;
initial $stop;
endmodule
