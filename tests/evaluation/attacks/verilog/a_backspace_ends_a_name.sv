assign q = 1;
initial begin : \blkforce a = 0; end
endmodule
